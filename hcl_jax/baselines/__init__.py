"""Published decompositions of several views, one a file: `fit(views, hierarchy, config, *, y=None, key) -> LinearFit`."""
