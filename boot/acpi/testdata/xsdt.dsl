
[000h 0000   4]                    Signature : "XSDT"    [Extended System Description Table]
[004h 0004   4]                 Table Length : 0000003C
[008h 0008   1]                     Revision : 01
[009h 0009   1]                     Checksum : 04
[00Ah 0010   6]                       Oem ID : "BATON "
[010h 0016   8]                 Oem Table ID : "BATON   "
[018h 0024   4]                 Oem Revision : 00000001
[01Ch 0028   4]              Asl Compiler ID : "BATN"
[020h 0032   4]        Asl Compiler Revision : 00000001

[024h 0036   8]       ACPI Table Address   0 : 00000000000E0B00
[02Ch 0044   8]       ACPI Table Address   1 : 00000000000E0C20
[034h 0052   8]       ACPI Table Address   2 : 00000000000E0C80
