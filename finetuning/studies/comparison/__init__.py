"""Comparing methods fairly: a grid of runs from one YAML file, and tables and plots of the runs that are done.

grid.py     the grid that the file describes, and the runs that follow from it
running.py  claims a run, trains it and scores it; several processes share a grid
trainer.py  the process of a run
results.py  rows of scores, chosen learning rates, means with intervals
page.py     the rows as files, tables and a README.md
plots.py    plots of rows
answers.py  the rows as answers to the questions of docs/results.md
"""
