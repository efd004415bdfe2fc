"""growmerge: grow a language model, train it on new languages, merge the language models, evaluate all of it."""

__version__ = "0.1.0"
