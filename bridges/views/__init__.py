"""What the page shows of each thing: circuits, channels, tasks; and `report`, which collects and writes it."""
