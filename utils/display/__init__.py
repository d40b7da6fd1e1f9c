"""Dashboard, pictures, reports, commands to paste: imports utils.core."""
