"""What a layer of a model may consist of, as data: mixers, MLPs, experts, norms. They import no torch."""
