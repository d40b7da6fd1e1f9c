"""Networks and probability. All modules but pretrained import only utils.core and utils.data, and use no files and no
terminal. The module pretrained reads files and imports hparams, when a program first uses `load_pretrained`."""


def __getattr__(name):
    if name == "load_pretrained":
        from models.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
