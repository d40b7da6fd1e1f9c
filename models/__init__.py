"""Networks and probability: no files, no terminal, no devices by name. Imports utils.core and utils.data. Only
pretrained, which is imported when `load_pretrained` is asked for, reads files and imports hparams."""


def __getattr__(name):
    if name == "load_pretrained":
        from models.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
