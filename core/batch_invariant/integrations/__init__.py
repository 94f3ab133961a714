"""Other libraries' extension points, filled in; each module is imported by whoever wants it."""
