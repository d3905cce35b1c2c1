"""Published benchmarks as data: a YAML file each, over few readers, parsers, rules and figures. Loads without torch.

    files --rows--> Row --parsers--> Parsed(value, how) --rules--> score --figures--> figures with intervals

`spec` holds what a YAML may say, `rows` reads a benchmark's files, `parsers` and `rules` are tables of functions,
`figures` adds up, and `scoring` puts them together.
"""
