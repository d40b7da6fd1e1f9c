"""What the scripts share: models, codes, samples, features, results, pictures. The folder imports all other folders."""
