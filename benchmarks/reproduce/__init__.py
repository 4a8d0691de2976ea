"""The study of docs/reproduction.md: does sharpening help, and what does the paper's protocol show?

In reading order:

- ``questions``: what is asked
- ``scoring``: choice questions by likelihood
- ``texts``: the loss of prose, and answers in text
- ``cells``: what runs on what, and how a killed run goes on
"""
