"""Comparing methods fairly: a grid of runs from one YAML file, run in pieces; tables and plots of what is there.

grid.py     what the file says, and the runs that follow from it
running.py  claim a run, train it, score it; several processes share a grid
trainer.py  the process of a run
results.py  rows of scores, chosen learning rates, means with intervals
page.py     the rows as files, tables and a README.md
plots.py    pictures of rows
"""
