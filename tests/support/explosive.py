"""An object that runs code when it is unpickled."""


class Explosive:
    """Leaves a mark if it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), 'w'))
