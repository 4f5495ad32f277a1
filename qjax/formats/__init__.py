"""Reading and writing programs. Optional dependencies stop here."""
