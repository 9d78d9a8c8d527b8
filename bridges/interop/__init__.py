"""Other libraries' formats: a circuit as Neuronpedia's graph, a bridge as a SAELens folder."""
