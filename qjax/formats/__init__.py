"""Readers and writers of programs. Optional dependencies stop here."""
