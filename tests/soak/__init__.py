"""Long runs that look for rare wrong bytes; short seeded versions of them are ordinary tests."""
