"""A release: the proven engines of a fleet in one folder, from which each machine takes its own.

``profiles`` are the types, ``publishing`` makes a release, ``choosing`` picks of it for a machine.
"""
