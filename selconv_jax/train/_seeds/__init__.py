"""Runs that differ in their seed alone, whose steps are made in one program."""
