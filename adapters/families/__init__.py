"""Model families, a file each with its `Family` records. They import no torch."""
