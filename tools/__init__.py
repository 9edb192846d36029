"""Programs for developers and for `make`, in no wheel."""
