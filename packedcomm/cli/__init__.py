"""The command line: `packedcomm plan`, `packedcomm doctor` and `packedcomm demo`."""
