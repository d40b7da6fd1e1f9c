"""What the scripts share: models, codes, samples, features, results, pictures. Imports all other folders."""
