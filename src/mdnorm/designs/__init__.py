"""Parts of `mdnorm.Design`: tables, formulas, bases and the diagnosis of a design."""
