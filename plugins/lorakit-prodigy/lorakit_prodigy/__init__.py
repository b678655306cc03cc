"""The optimizer Prodigy for lorakit."""
