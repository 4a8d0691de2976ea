"""Find out whether sharpening helps: tasks, controls, ablations and the statistics to tell.

Files in reading order:

- ``grid``: a grid file, and the cells that it asks for.
- ``tasks``: offline tasks, and the loading of others.
- ``controls``: the same model with the guidance taken out of the update.
- ``paired``: outcomes of documents, and statistics of two variants paired by document.
- ``templates``: tables and reports in Markdown and HTML, filled by jinja2.
- ``runs``: evaluate the cells of a grid into a folder, safe to kill and to share.
- ``lm``: what lm-evaluation-harness sees of a sharpened model.
- ``harness``: tasks of lm-evaluation-harness under any config and control.
- ``comparison``: every cell against the baseline and against its controls.
- ``confidence``: the paper's confidence-filtered comparison, and why it flatters.
- ``summary``: an analysis in sentences, and numbers as they are written.
- ``report``: Markdown, CSV, two pictures, and one page that needs nothing else.
"""
