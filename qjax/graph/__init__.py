"""The integer graph: what a lowered model computes, checked, printed and saved."""
