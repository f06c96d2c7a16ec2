"""Garbage collection of DVC's cache and of a remote, with a budget, that keeps what others need.

`dvc gc --cloud` keeps what the clone that runs it needs, and drops what only others need
(treeverse/dvc#2325). Here each clone leaves a lease beside the objects: a list of what it needs.
"""
