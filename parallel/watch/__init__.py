"""Those who look on: they hear of every call of a verb, and leave its arrays alone."""
