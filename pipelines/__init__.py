"""Pipelines: one adapter file for each family, pointing inward to the engine. Found by name, imported when asked for."""

if __name__ != "diffalign.pipelines":
    raise ImportError(f"{__name__!r} is a folder of diffalign's checkout: import diffalign.pipelines instead")
