"""The configuration: one YAML file an option, and the schema that checks them."""
