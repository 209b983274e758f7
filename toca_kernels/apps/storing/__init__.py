"""Files that are there whole or not at all: text, arrays, pictures."""
