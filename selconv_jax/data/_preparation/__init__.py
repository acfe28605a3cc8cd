"""Downloaded originals into the files that training reads."""
