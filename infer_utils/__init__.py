"""What inference needs besides the model: ensembling and drawing."""
