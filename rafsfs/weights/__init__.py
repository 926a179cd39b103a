"""Headers of files of weights: which tensor is where. Pure; a parser is given a function that reads."""
