"""What a plan takes and brings, foreseen from public constants and a probe of the machine."""
