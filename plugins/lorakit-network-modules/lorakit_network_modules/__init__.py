"""Network modules in the form that sd-scripts takes, such as LyCORIS, as networks of lorakit."""
