"""What several tests of one subject share."""

import fractions

Fraction = fractions.Fraction


INT32 = -(2**31), 2**31 - 1
