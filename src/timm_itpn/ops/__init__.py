"""Operations that have one meaning and several implementations."""
