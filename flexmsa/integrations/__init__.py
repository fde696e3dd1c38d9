"""flexmsa in other libraries. Each package here needs its library and is not imported by flexmsa itself."""
