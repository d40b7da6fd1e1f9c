"""Code that does not depend on models. data, evaluation and display import core; training imports all of these."""
