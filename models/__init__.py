"""Networks and probability: no files, no terminal, no devices by name. The folder imports utils.core and utils.data.
Only the module pretrained reads files and imports hparams; it is imported when a program uses `load_pretrained`."""


def __getattr__(name):
    if name == "load_pretrained":
        from models.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
