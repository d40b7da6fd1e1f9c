"""Networks and probability: no files, no terminal, no devices by name. Imports utils.core and utils.data."""
