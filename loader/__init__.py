"""One node: aspired versions become ready servables in worker processes."""
