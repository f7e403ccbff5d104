"""Tables, figures and the report, made from saved results only: nothing here trains, solves or imports torch."""
