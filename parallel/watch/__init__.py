"""Those who look on: told of every call of a verb, they leave its arrays alone."""
