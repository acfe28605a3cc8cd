"""Runs that differ only in their seed, with their steps computed by one program."""
