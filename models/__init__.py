"""Networks and probability. The modules use no files, no terminal and no devices by name, and import only utils.core
and utils.data. The module pretrained is the exception, because it reads files and imports hparams. The first use of
`load_pretrained` imports this module."""


def __getattr__(name):
    if name == "load_pretrained":
        from models.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
