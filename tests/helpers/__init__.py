"""What tests of several kinds share; each module says what it is for."""
