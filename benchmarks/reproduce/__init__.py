"""The study of docs/reproduction.md: does sharpening help, and what does the paper's protocol show?

``preregistration.md`` says what is tested and how, and was written before the first cell ran. In
reading order:

- ``questions``: what is asked
- ``scoring``: choice questions by likelihood, ``texts``: prose and answers
- ``protocol``: the paper's loop with the gold in it
- ``measures``: outcomes of all three
- ``cells``: what runs on what, and how a killed run goes on; ``python -m benchmarks.reproduce``
- ``equivalence``: two one-sided tests
- ``findings``: the tests of every comparison; ``report``: tables and a picture
"""
