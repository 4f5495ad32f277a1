"""Operations of the integer graph."""
