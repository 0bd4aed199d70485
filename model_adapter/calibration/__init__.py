"""How much memories count: constants for a model, measured on the text of a database."""
