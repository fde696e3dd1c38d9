"""Other libraries with flexmsa inside. Each package is imported only when asked for, and needs its library."""
